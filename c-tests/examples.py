#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs one of the C examples on small images: what it is for, and what it says
when it is called in a wrong way.

    examples.py overlay|map|epoll|sandbox DIRECTORY_OF_THE_PROGRAMS"""

import os
import random
import re
import subprocess
import sys
import tempfile

name, programs = sys.argv[1:]
SIZE = 4 << 20
os.environ['LC_ALL'] = 'C'


def run(program, *args, status=0):
    """Runs a program that must exit with `status`; its output and messages."""
    # Leaks are looked for by way of files that the sandbox does not open.
    env = dict(os.environ, ASAN_OPTIONS='detect_leaks=0') if program == 'sandbox' else None
    done = subprocess.run([os.path.join(programs, program), *args], text=True, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != status:
        sys.exit(f'{program} {args} exits with {done.returncode}, not {status}:\n'
                 f'{done.stdout}{done.stderr}')
    return done.stdout, done.stderr


def expect(what, is_so):
    if not is_so:
        sys.exit(f'not so: {what}')


def make_overlay(*options):
    """An overlay on `base.raw`, with 64 random blocks."""
    out, _ = run('overlay', '-n', '64', *options, 'base.raw', 'top.qcow2')
    return {key: int(value) for key, value in map(str.split, out.splitlines())}


def test_overlay():
    extended = make_overlay('-e', '-c', '128k', '-x', 'expected.raw')
    expect('nothing is copied', extended['bytes_copied'] == 0)
    standard = make_overlay('-c', '128k')
    expect('a lot is copied', standard['bytes_copied'] > SIZE // 2)
    for costs in extended, standard:
        expect('all was written', costs['guest_bytes_written'] == 64 * 4096)
        expect('all was verified', costs['bytes_verified'] == SIZE)

    with open('base.raw', 'rb') as base, open('expected.raw', 'rb') as expected:
        before, after = base.read(), expected.read()
    expect('the sizes are the same', len(before) == len(after))
    changed = [at for at in range(0, SIZE, 4096) if before[at:at + 4096] != after[at:at + 4096]]
    expect('64 blocks are different', len(changed) == 64)

    for wrong in ['-c', '100k'], ['-n', '9999']:
        _, said = run('overlay', *wrong, 'base.raw', 'wrong.qcow2', status=1)
        expect('a message', said.startswith('overlay: '))
    _, said = run('overlay', 'missing.raw', 'wrong.qcow2', status=1)
    expect('the file is named', said == 'overlay: missing.raw: No such file or directory\n')


def parts(*args):
    """What map prints, as (offset, length, depth, state)."""
    out, _ = run('map', *args)
    rows = [line.split() for line in out.splitlines()[1:]]
    return [(int(row[0], 0), int(row[1], 0), int(row[2]), row[3]) for row in rows]


def test_map():
    make_overlay('-e', '-c', '128k')
    for args, below in (['-c', 'top.qcow2'], (1, 'data')), (['top.qcow2'], (0, 'below')):
        at = 0
        for offset, length, depth, state in parts(*args):
            expect('there is no gap', offset == at)
            expect('a known state', (depth, state) in [(0, 'data'), below])
            at += length
        expect('all is covered', at == SIZE)
        mine = sum(length for _, length, depth, state in parts(*args)
                   if (depth, state) == (0, 'data'))
        expect('what was written is in the overlay', mine == 64 * 4096)

    _, said = run('map', 'missing.qcow2', status=1)
    expect('the file is named', 'missing.qcow2: No such file' in said)
    _, said = run('map', 'base.raw', status=1)
    expect('it says why', 'magic' in said)


def test_epoll():
    make_overlay('-e', '-c', '128k', '-x', 'expected.raw')
    for depth in '1', '7', '32':
        out, said = run('epoll', '-d', depth, 'top.qcow2', 'copy.raw')
        expect('it says what it did', out.startswith(f'{SIZE} bytes, '))
        with open('copy.raw', 'rb') as copy, open('expected.raw', 'rb') as expected:
            expect('the copy is the disk', copy.read() == expected.read())
    _, said = run('epoll', 'missing.qcow2', 'copy.raw', status=1)
    expect('the file is named', said == 'epoll: missing.qcow2: No such file or directory\n'
           or 'missing.qcow2' in said)
    _, said = run('epoll', '-d', '0', 'top.qcow2', 'copy.raw', status=2)
    _, said = run('epoll', 'top.qcow2', 'missing/copy.raw', status=1)
    expect('the file is named', 'missing/copy.raw' in said)


def test_sandbox():
    make_overlay('-e', '-c', '128k', '-x', 'expected.raw')
    base = os.path.realpath('base.raw')
    # The checksum, Fowler/Noll/Vo's, is computed anew.
    checksum = 0xcbf29ce484222325
    with open('expected.raw', 'rb') as expected:
        for byte in expected.read():
            checksum = (checksum ^ byte) * 0x100000001b3 & (1 << 64) - 1
    out, said = run('sandbox', 'top.qcow2', f'{base}=base.raw')
    expect('the contents', out == f'{checksum:016x} {SIZE} bytes\n')
    expect('it was asked once', len(re.findall('granted$', said, re.M)) == 1)

    for allowed in [], ['base.raw=base.raw'], [f'{base}2=base.raw']:
        out, said = run('sandbox', 'top.qcow2', *allowed, status=1)
        expect('nothing is read', out == '')
        expect('it is refused', re.search('refused$', said, re.M))
    _, said = run('sandbox', 'missing.qcow2', status=1)
    expect('the file is named', said == 'sandbox: missing.qcow2: No such file or directory\n')
    _, said = run('sandbox', 'top.qcow2', f'{base}=missing.raw', status=1)
    expect('the file is named', said == 'sandbox: missing.raw: No such file or directory\n')
    run('sandbox', 'top.qcow2', 'base.raw', status=2)


with tempfile.TemporaryDirectory() as directory:
    os.chdir(directory)
    with open('base.raw', 'wb') as file:
        file.write(random.Random(1).randbytes(SIZE))
    out, said = run(name, status=2)
    expect('how to call it, as a message', out == '' and said.startswith(f'usage: {name} '))
    if name != 'sandbox':
        run(name, '-?', 'file', 'file', status=2)
    {'overlay': test_overlay, 'map': test_map, 'epoll': test_epoll,
     'sandbox': test_sandbox}[name]()
