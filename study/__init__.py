"""The study: arms x seeds, judged. `python -m study` runs it; nothing else in the repository imports it.

__main__.py  the command line
paper.py     the paper's shape on one GPU: tests, speed, a backbone and its arms, in one command
arms.py      arms become command lines of train.py; which runs may lie in one study
runner.py    runs them side by side, with the projected minutes first
tuning.py    the sweep of learning rates
records.py   what a report needs of a finished run, in one line of runs.jsonl
measures.py  which records may be compared, against which references, and what is measured of them
audit.py     labels against exact flips, the ceiling, one checkpoint at other budgets
claims.py    the rule and the claims, as contrasts listed beforehand
verdicts.py  from records to verdicts and their sentences
report.py    a results folder's README.md; leaderboard.py, details.py and beside.py make its tables and pages
map.py       results/README.md: claims x regimes
pictures.py  the pictures; lines.py, style.py: those over steps, and how all of them look
"""
