# SmolLM2-135M as the frozen backbone: 30 layers, width 576, trained on 2T tokens. Its shape comes with it. Without a
# network give --backbone=hf:FOLDER. Another Llama of about this size works with the same file.
# python prepare.py --source='my/*.parquet' --name=smollm2 --tokenizer=hf:HuggingFaceTB/SmolLM2-135M
scale = "smollm2"
dataset = "smollm2"
backbone = "hf:HuggingFaceTB/SmolLM2-135M"
block_size = 256
controlled = []
cheap_rank = 96
g1_hidden = 59
latent = 32
max_iters = 200
warmup_iters = 20
batch_size = 4
eval_interval = 50
eval_iters = 4
final_eval_iters = 8
log_interval = 5
learning_rate = 2e-2
gate_lr = 1e-2
