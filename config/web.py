# Web-like prose, byte-level, four times the parameters of tiny, twice its context: a second regime for a CPU.
# python prepare.py --source='my/*.parquet' --name=web --tokenizer=bytes
scale = "web"
dataset = "web"
n_layer = 8
n_embd = 256
block_size = 256
controlled = [1, 2, 3, 4, 5, 6, 7]
cheap_rank = 64
g1_hidden = 58
latent = 24
max_iters = 600
backbone_iters = 1_000
