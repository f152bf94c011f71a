#!/usr/bin/env bash
# EMR-Merging of the eight CLIP-ViT-B/32 models, each task evaluated with its own mask and scale.
set -euo pipefail

fusion_bench \
    fabric.loggers.name=emr_merging/ViT-B-32_TA8 \
    method=emr_merging/emr_merging \
    modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
    taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8 \
    report_save_path=outputs/emr_merging/clip-vit-base-patch32_TA8.json
