"""Saved in the format of 2013: worksheets, `input` in place of `source`."""


def submission(toy):
    cells = []
    for cell in toy.filled(toy.SOLUTIONS)["cells"]:
        if cell["cell_type"] == "code":
            cells.append({"cell_type": "code", "input": cell["source"], "language": "python", "metadata": {}, "outputs": [], "collapsed": False})
        else:
            cells.append({"cell_type": "markdown", "source": cell["source"], "metadata": {}})
    return {"metadata": {"name": ""}, "nbformat": 3, "nbformat_minor": 0, "worksheets": [{"cells": cells, "metadata": {}}]}
