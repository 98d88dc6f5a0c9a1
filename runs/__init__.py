"""What stands behind the method: where a run happens and what it leaves.

machine.py   the device, the dtype, the threads, several processes
options.py   which configs are refused, and why
files.py     files that appear whole or not at all, and are read with a schema
folder.py    a run's folder: whose it is, and reading what a run left there
backbone.py  the frozen model: what it is, where it comes from
gpt2.py      GPT-2's weights as the backbone
paint.py     the routing of a text, in a terminal
view.py      the same as a page or a picture
optim.py     AdamW, Muon, the learning rate
run.py       one run: its folder, its checkpoint, its log, its summary
"""
