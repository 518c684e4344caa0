"""Experiments on what students learn: `comparison`, `black_box`, `quickstart` and `retriever` are commands.

Modules that are not commands: tasks with a known truth (`walks`, `purse`, `signs`, `currencies`), parts of `black_box`
(`reasoning`, `in_context`, `adversarial`, `preferences`), and shared code (`harness`, `measures`, `words`).
"""
