"""A merged model behind HTTP: text and classes per task, requests of several tasks batched into one forward.

``limits`` bound everything that is asked, ``processors`` are what makes inputs of it, each task's own, and ``layouts`` texts of
conversations, ``batching`` collects what is asked at the same time, ``language`` and ``classification`` run a batch, ``opening``
chooses between them by the model's directory, and ``app`` speaks HTTP. Only the last one needs the extra
``fusion-bench-didi[serve]``.
"""
