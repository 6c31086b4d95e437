"""Preference optimisation from single completions, each marked good or bad.

    accelerate launch --config_file ds_configs/launch_cpu2.yaml recipes/kto.py --config my.yaml --learning_rate 1e-5
"""

from align_kit.run import main

if __name__ == "__main__":
    main("kto")
