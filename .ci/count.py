"""Count a ctest's results: count.py JUNIT_FILE EXPECTED_SKIPS

Names each failure and each skip, and ends with "counts PASSED FAILED SKIPPED". A test that skips itself without being
listed in EXPECTED_SKIPS, or is listed with another reason, counts as failed; so does one that was not run.

A line of EXPECTED_SKIPS is "NAME | REASON": two extended regular expressions, the first for the whole of a test's
name, the second for a part of its last line. The first " | ", with its spaces, divides them; both may hold "|".
"""
import re
import sys
import xml.etree.ElementTree as tree


def expected_skips(path):
    pairs = []
    with open(path, encoding='utf-8') as lines:
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if not line or line.startswith('#'):
                continue
            name, bar, reason = line.partition(' | ')
            if not bar:
                sys.exit(f'{path}:{number}: "NAME | REASON" expected, not "{line}"')
            try:
                pairs.append((re.compile(name.strip()), re.compile(reason.strip())))
            except re.error as error:
                sys.exit(f'{path}:{number}: {error}')
    return pairs


def main(junit, skips):
    expected = expected_skips(skips)
    passed = failed = skipped = 0
    for case in tree.parse(junit).getroot().iter('testcase'):
        name, status = case.get('name'), case.get('status')
        lines = [line for line in (case.findtext('system-out') or '').splitlines() if line.strip()]
        if status == 'run':
            passed += 1
        elif case.find('skipped') is not None:
            reason = lines[-1] if lines else 'no reason given'
            if any(n.fullmatch(name) and r.search(reason) for n, r in expected):
                skipped += 1
                print(f'skipped {name}: {reason}')
            else:
                failed += 1
                print(f'FAILED {name}: a skip that nobody expected: {reason}')
        elif status in ('notrun', 'disabled') and case.find('failure') is None:
            failed += 1
            print(f'FAILED {name}: it was not run')
        else:
            failed += 1
            print(f'FAILED {name}')
    print(f'counts {passed} {failed} {skipped}')


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit(__doc__.splitlines()[0])
    main(*sys.argv[1:])
