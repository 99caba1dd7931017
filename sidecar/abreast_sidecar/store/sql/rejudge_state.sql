select abreast.hold_rules() as version, listed, judged, exists (select from abreast.rejudge) as pending
from abreast.rule_state
