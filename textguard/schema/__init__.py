"""What the stages' JSON files hold: one typed model per file, in one module per stage that writes it.

Whoever writes a file builds its model, whoever reads it validates it: see `read` in textguard.schema.base. The modules are
apart because DVC reruns a stage whose code changed: a new field of a cell must not repeat a campaign.
`python -m textguard.schema.document > docs/outputs.md` writes the reference.
"""
