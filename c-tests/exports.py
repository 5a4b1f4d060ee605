#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Compares what a library exports with the map and the header, and looks at
what a packager looks at: soname, needed libraries, flags."""

import argparse
import re
import subprocess
import sys

parser = argparse.ArgumentParser()
parser.add_argument('--header', required=True)
parser.add_argument('--map', required=True)
parser.add_argument('--soversion', required=True)
parser.add_argument('--library', required=True)
parser.add_argument('--unversioned', action='store_true', help='built by cargo alone')
args = parser.parse_args()

NEEDED = re.compile(r'(libc|libm|libgcc_s|ld-linux.*|ld64)\.so\.\d+')
failures = []


def check(ok, text):
    if not ok:
        failures.append(text)


def run(*command):
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def read(path):
    with open(path) as file:
        return file.read()


def same(what, names):
    for name in sorted(names - declared):
        check(False, f'{name}: in {what}, not in the header')
    for name in sorted(declared - names):
        check(False, f'{name}: in the header, not in {what}')


code = re.sub(r'/\*.*?\*/', '', read(args.header), flags=re.DOTALL)
declared = set(re.findall(r'^[a-zA-Z][^#;(){}]*\b(qcow2rs_\w+)\(', code, re.MULTILINE))
check(declared, 'the header declares no function')
same('the map', set(re.findall(r'^\s*(\w+);', read(args.map), re.MULTILINE)))

is_shared = '.so' in args.library
symbols = run('nm', '--defined-only', '--extern-only', *(['-D'] if is_shared else []), args.library)
found = [line.split()[-1] for line in symbols.splitlines() if len(line.split()) == 3]
# The names of the version nodes are symbols themselves.
found = [name for name in found if not name.startswith('QCOW2RS_')]
names = {name.partition('@')[0] for name in found}
same('the library', names)

if is_shared:
    if not args.unversioned:
        for name in found:
            check('@@QCOW2RS_' in name, f'{name}: no version')
    dynamic = run('readelf', '--wide', '--dynamic', '--program-headers', args.library)
    soname = re.findall(r'SONAME.*\[(.*)\]', dynamic)
    check(soname == [f'libqcow2rs.so.{args.soversion}'], f'soname is {soname}')
    for name in re.findall(r'NEEDED.*\[(.*)\]', dynamic):
        check(NEEDED.fullmatch(name), f'{name}: needed')
    check('NODELETE' in dynamic, 'not marked NODELETE')
    check('TEXTREL' not in dynamic, 'has text relocations')
    check('RUNPATH' not in dynamic and 'RPATH' not in dynamic, 'has a run path')
    check(re.search(r'GNU_STACK .* RW ', dynamic), 'wants an executable stack')

if failures:
    sys.exit('\n'.join([args.library, *failures]))
print(f'{args.library}: {len(declared)} functions')
