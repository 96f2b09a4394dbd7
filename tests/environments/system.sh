#!/usr/bin/env bash
# Install the system programs that tests use. Where this is not root on Debian, name those that are missing and go on.
set -euo pipefail

# A program and the Debian package that has it. /proc and /dev/full are used as well, and need no package.
programs='
bash bash
cut coreutils
head coreutils
sort coreutils
tail coreutils
tr coreutils
diff diffutils
find findutils
xargs findutils
git git
grep grep
sed sed
nginx nginx-light
openssl openssl
zsh zsh
fish fish
'

missing=()
while read -r program package; do
    [ -z "$program" ] || command -v "$program" > /dev/null || missing+=("$package")
done <<< "$programs"
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv)

if [ ${#missing[@]} -eq 0 ]; then
    echo 'system: every program that tests use is there'
elif [ "$(id -u)" -ne 0 ]; then
    echo "system: skipped, because this is not root: ${missing[*]}"
elif ! command -v apt-get > /dev/null; then
    echo "system: skipped, because there is no apt-get: ${missing[*]}"
else
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${missing[@]}"
fi
