"""Windows of limited sight give integers for each class; rules on these integers answer and certify."""
