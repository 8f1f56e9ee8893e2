"""Written on Windows: CRLF line ends in the cells, and a byte order mark before the file."""
import json


def submission(toy):
    made = toy.filled(toy.SOLUTIONS)
    for cell in made["cells"]:
        cell["source"] = cell["source"].replace("\n", "\r\n")
    return b"\xef\xbb\xbf" + json.dumps(made, indent=1).replace("\n", "\r\n").encode()
