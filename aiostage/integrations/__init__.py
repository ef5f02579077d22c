"""aiostage in the terms of other libraries, each loaded only when asked for."""
