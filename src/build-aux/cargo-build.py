#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs cargo for meson: builds the static library, and tells ninja by a
depfile what it was made of."""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys

parser = argparse.ArgumentParser()
parser.add_argument('--cargo', required=True)
parser.add_argument('--source', required=True)
parser.add_argument('--target-dir', required=True)
parser.add_argument('--profile', required=True)
parser.add_argument('--target')
parser.add_argument('--linker')
parser.add_argument('--feature', action='append', default=[])
parser.add_argument('--output', required=True)
parser.add_argument('--depfile', required=True)
parser.add_argument('cargo_flags', nargs='*')
args = parser.parse_args()
output = os.path.abspath(args.output)
depfile = os.path.abspath(args.depfile)
target_dir = os.path.join(args.source, args.target_dir)

command = [args.cargo, 'rustc', '--lib', '--crate-type', 'staticlib',
           '--target-dir', target_dir, '--profile', args.profile, *args.cargo_flags]
env = dict(os.environ)
# A target in the environment would move the output.
target = args.target or env.get('CARGO_BUILD_TARGET')
if target:
    command += ['--target', target]
if args.linker:
    env[f"CARGO_TARGET_{target.upper().replace('-', '_')}_LINKER"] = args.linker.split()[0]
for feature in args.feature:
    command += ['--features', feature]

# cargo looks for its configuration (vendored sources) from where it runs.
status = subprocess.run(command, cwd=args.source, env=env).returncode
if status != 0:
    sys.exit(status)

built = os.path.join(target_dir, target or '',
                     'debug' if args.profile == 'dev' else args.profile)
archive = os.path.join(built, 'libqcow2rs.a')
if not (os.path.exists(output) and filecmp.cmp(archive, output, shallow=False)):
    shutil.copyfile(archive, output)
else:
    os.utime(output)

with open(os.path.join(built, 'libqcow2rs.d')) as file:
    _, _, sources = file.read().partition(': ')
manifests = [os.path.join(args.source, name) for name in ('Cargo.toml', 'Cargo.lock')]
with open(depfile, 'w') as file:
    file.write(f"{args.output}: {sources.strip()} {' '.join(manifests)}\n")
