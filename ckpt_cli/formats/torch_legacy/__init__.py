"""What `torch.save` wrote before 1.6: streams of pickles, and tar files."""
