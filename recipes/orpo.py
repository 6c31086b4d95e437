"""Odds-ratio preference optimisation, from the base model and without a reference.

    accelerate launch --config_file ds_configs/launch_cpu2.yaml recipes/orpo.py --config my.yaml --learning_rate 1e-5
"""

from align_kit.run import main

if __name__ == "__main__":
    main("orpo")
