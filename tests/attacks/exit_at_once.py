# exercise: repeat
"""Ends the process while the cell is defined."""
import sys

sys.exit(0)
