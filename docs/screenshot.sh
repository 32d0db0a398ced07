#!/bin/sh
# Take the README's picture of a run's report with headless Chromium:
#   docs/screenshot.sh runs/demo [docs/report.png] [WIDTH,HEIGHT]
set -eu

run=${1:?"usage: docs/screenshot.sh RUN [PICTURE.png] [WIDTH,HEIGHT]"}
picture=${2:-docs/report.png}
size=${3:-1100,1420}
page=$(cd "$run" && pwd)/report.html

[ -f "$page" ] || { echo "$page: not found. Write it: groundup report $run" >&2; exit 1; }
for browser in chromium chromium-browser google-chrome; do
    command -v "$browser" >/dev/null 2>&1 && break
    browser=
done
[ -n "$browser" ] || { echo "No Chromium found. On Debian: apt-get install chromium" >&2; exit 1; }

profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT INT TERM
sandbox=
[ "$(id -u)" -ne 0 ] || sandbox=--no-sandbox # Chromium refuses its sandbox to root
"$browser" --headless $sandbox --disable-gpu --disable-background-networking --hide-scrollbars \
    --user-data-dir="$profile" --force-device-scale-factor=1.5 --window-size="$size" \
    --screenshot="$picture" "file://$page" 2>/dev/null
[ -s "$picture" ] || { echo "$browser took no picture." >&2; exit 1; }
echo "$picture"
