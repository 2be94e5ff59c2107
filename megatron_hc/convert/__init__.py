"""Checkpoints of others and ours: `tools/convert_checkpoint.py` and `tools/retrofit_residual.py` call what is here.

::

    names.py       the families: how each of them names its tensors
    pieces.py      one of our tensors <-> those of a family: names, shapes, how to join and to cut
    families.py    their config.json <-> our arguments
    shards.py      safetensors folders, read and written tensor by tensor
    checkpoints.py our folders, read and written tensor by tensor
    hf.py          the two directions
    custom.py      what no family has: export with modelling code of its own (``hf_code/``)
    tokenizers.py  tokenizer files beside a checkpoint
    logits.py      --check-logits
    megatron.py    Megatron-LM's torch_dist folders, read by torch_dist.py
    retrofit.py    a plain checkpoint -> another residual method of equal function
    rmsnorm.py     LayerNorm -> RMSNorm of equal function
"""
