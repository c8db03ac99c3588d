"""The items of tools/npu_check.py: a file for each, whose `run(check)` returns figures or raises
CheckFailed.

Beside them: `check` (what an item is given and gives back), `child` (the process that runs one),
`world` (ranks on their devices), `reference` (formulas in plain PyTorch), `jobs` (runs of the program).
"""
