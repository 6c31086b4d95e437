"""Pretraining on packed text, from random weights or continued.

    accelerate launch --config_file ds_configs/launch_cpu2.yaml recipes/pretrain.py --config my.yaml
"""

from align_kit.run import main

if __name__ == "__main__":
    main("pretrain")
