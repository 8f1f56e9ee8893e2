"""The checks of the exercises: one module for each workbook, `core` for what they share."""
