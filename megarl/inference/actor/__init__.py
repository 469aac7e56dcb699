"""An engine in a separate process, a Ray actor: the driver's handle and the actor's base class."""
