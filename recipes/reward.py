"""Reward modelling: one score for a completion, learnt from preference pairs.

    accelerate launch --config_file ds_configs/launch_cpu2.yaml recipes/reward.py --config my.yaml --learning_rate 1e-5
"""

from align_kit.run import main

if __name__ == "__main__":
    main("reward")
