"""Proximal policy optimisation from rewards: the policy writes, reward models or functions judge.

    accelerate launch --config_file ds_configs/launch_cpu2.yaml recipes/ppo.py --config my.yaml --learning_rate 1e-6
"""

from align_kit.run import main

if __name__ == "__main__":
    main("ppo")
