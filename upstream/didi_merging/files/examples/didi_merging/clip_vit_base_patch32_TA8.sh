#!/usr/bin/env bash
# DiDi-Merging of the eight CLIP-ViT-B/32 models of Task Arithmetic, at the larger vision budget.
set -euo pipefail

fusion_bench \
    fabric.loggers.name=didi_merging/ViT-B-32_TA8 \
    method=didi_merging/didi_merging_m \
    modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
    taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8 \
    report_save_path=outputs/didi_merging/clip-vit-base-patch32_TA8.json
