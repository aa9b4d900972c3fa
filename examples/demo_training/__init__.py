"""Training of Foregate's two demo Mixture-of-Experts language models from scratch."""
