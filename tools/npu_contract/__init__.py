"""The contract with torch_npu: what the project calls of it, held to what wheels of it define.

`calls` finds the calls in our sources, `wheel` reads what a release defines, `table` keeps the part
that is called, `binding` binds a call to a signature, `check` puts them together. Nothing here
imports torch_npu. The program is tools/torch_npu_contract.py.
"""
