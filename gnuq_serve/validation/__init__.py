"""The method against references: small networks against NUTS, and other covariances against the isotropic one.

Needs ``pip install 'gnuq-serve[validate]'``. In the order of imports:

* `problems`, `networks`: data whose probabilities are known, and the classifiers that learn from it;
* `training`, `posterior`: the trained weights, and the reference by NUTS;
* `covariance`: first-order variances under several covariances of the weights;
* `study`: one run of all that; `runs`: many runs, resumable; `agreement`: what they say together;
* `language_model`: the same covariances on a causal language model.
"""
