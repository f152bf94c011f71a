"""Every method that makes a dynamic model of stored forms, in the settings in which its files and its account are checked."""

from fusion_bench_didi import method as methods

DYNAMIC = {
    "tsv_c": lambda: methods.TSVCompression(),
    "tsv_c matrix": lambda: methods.TSVCompression(conv="matrix", fold_sigma=False),
    "tall ties": lambda: methods.TallMaskMerging(),
    "tall sum": lambda: methods.TallMaskMerging(multi_task="task_arithmetic"),
    "twin": lambda: methods.TwinMerging(),
    "twin dense": lambda: methods.TwinMerging(conv="dense", rank_fraction=0.6),
    "free": lambda: methods.FreeMerging(),
    "free code": lambda: methods.FreeMerging(filter="code", keep=0.2),
    "free released": lambda: methods.FreeMerging(
        filter="code", keep=0.2, biases="released"
    ),
    "emr": lambda: methods.EMRMerging(),
    "randes": lambda: methods.RanDeS(),
    "bitdelta": lambda: methods.BitDelta(others="bfloat16"),
    "dare": lambda: methods.DARE(
        positions="stored", tensors="matrices", others="pretrained"
    ),
    "dare seed": lambda: methods.DARE(width=4, tensors="linear"),
    "t_switch": lambda: methods.TSwitch(),
    "compeft": lambda: methods.ComPEFT(),
    "tvq": lambda: methods.TaskVectorQuantization(),
    "rtvq": lambda: methods.TaskVectorQuantization(width=2, base_width=3),
    "lossless": lambda: methods.LosslessDifference(),
    "delta_come": lambda: methods.DeltaCoMe(others="checkpoint"),
    "ultra_delta": lambda: methods.UltraDelta(drop=0.9),
}
