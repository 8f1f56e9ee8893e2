"""Saved with outputs: text, errors, pictures, widgets, and metadata of editors."""


def submission(toy):
    made = toy.filled(toy.SOLUTIONS)
    for cell in made["cells"][1:]:
        cell["execution_count"] = 7
        cell["metadata"].update({"scrolled": True, "vscode": {"languageId": "python"}, "ExecuteTime": {"end_time": "x"}})
        cell["outputs"] = [
            {"output_type": "stream", "name": "stdout", "text": ["repeat: right\n"]},
            {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[31mred\x1b[0m"]},
            {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo=", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}, "metadata": {}},
        ]
    made["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    return made
