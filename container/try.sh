#!/bin/sh
# Build the Containerfile without a registry and run the result without an engine: what a machine with neither can still try.
#
#   sudo sh container/try.sh WORK PYTHON    # WORK: an empty folder; PYTHON: the prefix of a CPython 3.12, e.g. ~/.pyenv/versions/3.12.1
#   RUN_MOUNTS="--volume /etc/pip.conf:/etc/pip.conf:ro" …    # what pip needs to know here, mounted for the build's RUN lines only
#
# Needs Linux, root, and mmdebstrap, buildah, openssl, unshare, nsenter. In place of python:3.12-slim stands Debian with that CPython in /usr/local.
# The container is made by hand: namespaces with nothing but loopback, read-only root, no capability, uid 10001, as the Containerfile's head asks.
# Limits of memory, CPUs and processes are not set here (they are cgroups, the engine's work), nor is a seccomp profile.
set -eu
work=$(realpath "$1") python=$(realpath "$2")
cd "$(dirname "$0")/.."
engine="buildah --root $work/store --runroot $work/run --storage-driver vfs"

echo "== base"
mmdebstrap --quiet --variant=minbase --include=ca-certificates,libbz2-1.0,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,libssl3,libuuid1,libexpat1,zlib1g,netbase \
  bookworm "$work/debian.tar"
tar --directory "$python" --exclude=__pycache__ --exclude='lib*.a' --exclude=lib/python3.12/test --transform 's|^\.|usr/local|' -cf "$work/python.tar" .
printf 'FROM scratch\nADD debian.tar /\nADD python.tar /\nRUN ldconfig && python --version\n' > "$work/base.Containerfile"
$engine build --isolation chroot --file "$work/base.Containerfile" --tag base "$work" > "$work/base.log" 2>&1

echo "== build"
$engine build --isolation chroot --format docker --pull-never --build-arg BASE=localhost/base ${RUN_MOUNTS:-} --file Containerfile --tag medimg . > "$work/build.log" 2>&1
$engine inspect --type image localhost/medimg > "$work/image.json"
$engine images localhost/medimg
root=$($engine mount "$($engine from --pull-never localhost/medimg)")
mkdir -p "$root/run/secrets" "$work/volume" "$work/secrets"

echo "== what is in the image: programs that change the user, and files that should not be there"
find "$root" -xdev -type f -perm /6000 | grep . && exit 1
find "$root/opt" "$root/etc/medimg" "$root/data" -type f \( -name '*.ipynb' -o -path '*/tests/*' -o -path '*/test_files/*' -o -name '*_small.dcm' -o -name '*_key' -o -path '*/.git/*' \) | grep . && exit 1
test ! -e "$root/build"
find "$root/etc/pip.conf" "$root/etc/xdg/pip" -type f -size +0 2>/dev/null | grep . && exit 1

umask 077
openssl rand -hex 32 > "$work/secrets/audit_key"; openssl rand -hex 32 > "$work/secrets/key_pepper"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$work/secrets/tls_key" -out "$work/secrets/tls_cert" -days 2 \
  -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 2> /dev/null
chmod 0400 "$work"/secrets/*; chown -R 10001:10001 "$work/secrets" "$work/volume"
python3 -c 'import json, sys; print(*(e for e in json.load(sys.stdin)["OCIv1"]["config"]["Env"]))' < "$work/image.json" > "$work/env"

inside() {                              # inside COMMAND…: the container
  unshare --mount --net --pid --ipc --uts --fork --kill-child sh -euc '
    work=$1 root=$2; shift 2; r=/mnt
    mount --make-rprivate /
    mount --bind "$root" $r; mount -o remount,bind,ro,nosuid $r
    mount -t proc -o nosuid,nodev,noexec proc $r/proc
    mount -t tmpfs -o nosuid,noexec,mode=755 tmpfs $r/dev
    for d in null zero random urandom; do : > $r/dev/$d; mount --bind /dev/$d $r/dev/$d; done
    mkdir $r/dev/shm; mount -t tmpfs -o nosuid,nodev,noexec,size=64m,mode=1777 shm $r/dev/shm; mount -o remount,ro $r/dev
    mount -t tmpfs -o noexec,nosuid,nodev,size=1g,mode=1777 tmpfs $r/tmp
    mount --bind "$work/volume" $r/data; mount -o remount,bind,nosuid,nodev,noexec $r/data
    mount --bind "$work/secrets" $r/run/secrets; mount -o remount,bind,ro,nosuid,nodev,noexec $r/run/secrets
    ip link set lo up; ulimit -c 0; ulimit -n 4096
    exec chroot $r /usr/bin/env -i $(cat "$work/env") /usr/bin/setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
      sh -c "cd /data; exec \"\$@\"" sh "$@"' sh "$work" "$root" "$@"
}

echo "== from inside"
inside sh -c '
  id; grep -E "CapEff|CapBnd|NoNewPrivs" /proc/self/status
  for f in /x /etc/x /opt/medimg/x /usr/x /run/x /run/secrets/x /home/x /dev/x /var/tmp/x; do if (: > $f) 2> /dev/null; then echo "WROTE $f"; exit 1; fi; done
  (: > /tmp/x) && (: > /data/x) && echo "writable: /tmp, /data and nothing else tried"
  cp /bin/true /data/x && chmod +x /data/x && if /data/x 2> /dev/null; then echo "RAN A PROGRAM FROM /data"; exit 1; fi; rm /data/x
  echo "network: $(tail -n +3 /proc/net/dev | cut -d: -f1)"
  python -c "import socket; socket.create_connection((\"1.1.1.1\", 443), 3)" 2>&1 | tail -n 1'

echo "== serve"
inside medimg serve 2>&1 | grep "without a single API key"
key=$(inside medimg key add reader --role clinician 2> /dev/null | head -n 1)
echo "$key" | grep -q ^medimg_
(set +e; inside medimg serve > "$work/serve.log" 2>&1; echo "exit status $?" >> "$work/serve.log") &
until grep -q "medimg on" "$work/serve.log" 2> /dev/null; do sleep 0.2; done
pid=$(pgrep -u 10001 -o -f "medimg serve")
nsenter -t "$pid" -n python3 - "$key" "$work/secrets/tls_cert" <<'CLIENT'
import ssl, struct, sys, time, urllib.error, urllib.request, zlib
key, ca = sys.argv[1:]
def png(side=28):
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + bytes((x * y) % 256 for x in range(side)) for y in range(side))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
def ask(path, data=None, **headers):
    request = urllib.request.Request("https://127.0.0.1:8443" + path, data=data, headers={"Content-Type": "image/png", **headers})
    try:
        answer = urllib.request.urlopen(request, timeout=30, context=ssl.create_default_context(cafile=ca))
    except urllib.error.HTTPError as error:
        answer = error
    print(path, "->", answer.status, answer.read(70))
    return answer.status
for _ in range(100):
    try:
        assert ask("/healthz") == 200
        break
    except urllib.error.URLError:
        time.sleep(0.2)
assert ask("/readyz") == 200 and ask("/v1/predict", png()) == 401
assert ask("/v1/predict", png(), Authorization=f"Bearer {key}") == 200
assert ask("/v1/predict", b"\0" * 99, Authorization=f"Bearer {key}") == 415
CLIENT
kill -TERM "$pid"; wait $!
cat "$work/serve.log"; grep -q "exit status 0" "$work/serve.log"
echo "in /data:"; (cd "$work/volume" && find . -type f | sort)
