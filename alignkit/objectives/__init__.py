"""What is optimised: each file tells the whole story of one kind of objective."""
