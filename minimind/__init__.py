"""The package that the chapters build: one module for each chapter, generated from the notebooks.

Do not edit the files of this folder. Edit chapters/src and run `python -m course build`.
"""
