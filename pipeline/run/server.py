"""Imported by the server that stages are forked from, and by nothing else: it ends with the runner, and they with it.

Of itself it would stay until its last child has ended: every child holds the pipe whose end it waits for.
"""

from stages.runtime.aside import set_aside
from stages.runtime.processes import end_with_parent

end_with_parent()
set_aside()
