"""Saved by Colab: format 4.0, no ids, its own metadata; only the marker lines are left."""


def submission(toy):
    made = toy.filled(toy.SOLUTIONS)
    for number, cell in enumerate(made["cells"]):
        del cell["id"]
        cell["metadata"] = {"id": f"xYz{number:08d}", "colab": {"base_uri": "https://localhost:8080/"}, "outputId": "a1b2"}
        cell["source"] = cell["source"].splitlines(keepends=True)
    return {**made, "nbformat_minor": 0, "metadata": {"colab": {"provenance": []}, "kernelspec": {"name": "python3"}}}
