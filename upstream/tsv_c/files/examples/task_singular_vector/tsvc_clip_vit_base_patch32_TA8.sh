#!/usr/bin/env bash
# TSV-C of the eight CLIP-ViT-B/32 models of Task Arithmetic, at 1 / 8 of the directions per task.
set -euo pipefail

fusion_bench \
    fabric.loggers.name=tsv_c/ViT-B-32_TA8 \
    method=task_singular_vector/TaskSingularVectorCompression \
    modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
    taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8 \
    report_save_path=outputs/tsv_c/clip-vit-base-patch32_TA8.json
