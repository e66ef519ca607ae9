"""Operations between matrix products, each as one pass over memory forward and one backward."""
