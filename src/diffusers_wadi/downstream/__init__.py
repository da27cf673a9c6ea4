"""What a one-step student is used for: ControlNet, ReVersion, ScaleCrafter, DreamBooth. The modules never import one another."""
