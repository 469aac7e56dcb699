"""An engine in a process of its own, a Ray actor: the driver's handle and the actor's frame."""
