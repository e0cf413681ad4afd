"""For those who answer for the data: whether what the ledgers of a run say holds.

::

    metamoe.audit.verify(run).fine
"""

from metamoe.audit.verification import Verification, verify
from metamoe.common.audit.verify import Checked, Finding, Verdict

__all__ = ["Checked", "Finding", "Verdict", "Verification", "verify"]
