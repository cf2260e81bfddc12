"""The paper's ablations on a bundle and its validation frames, one command each: tables 5a to 5e and 8, object size."""
