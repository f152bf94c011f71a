"""Batches of several tasks in one forward: the weights of every task at hand, each sample under its own.

``weights`` are the backbone's, which tasks are written into and which come back, ``banks`` hold a tensor under every task,
``mixtures`` say which sample takes what of it, ``layers`` and ``network`` make a backbone of it, and ``forward`` runs a batch.
Nothing here knows the merged model.
"""
