#!/usr/bin/env bash
# Google Cloud: the script that instance-template.sh's machines run at each boot. Settings are instance attributes, none
# of them secret.
#
# Costs and removal: see instance-template.sh. On a machine: systemctl disable --now trainer;
# rm /etc/systemd/system/trainer.service.
# It is safe to run again. TRAINER_ROOT installs below a folder; failures go to standard error, and so to the serial
# console.
set -Eeuo pipefail
root=${TRAINER_ROOT:-}
metadata=http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1
me=$root/usr/local/sbin/trainer-machine
export DOCKER_CONFIG=$root/run/trainer/docker
say() { printf 'trainer-machine: %s\n' "$*" >&2; }
die() {
    trap - ERR
    say "error: $2"
    say "hint: $3"
    exit "$1"
}
trap 'die 70 "line $LINENO: \"$BASH_COMMAND\" failed" "see the lines above"' ERR
ask() {
    curl -fsS --noproxy '*' --retry 5 --retry-connrefused --max-time 10 -H 'Metadata-Flavor: Google' "$metadata/$1"
}
token() { ask instance/service-accounts/default/token | sed -n 's/.*"access_token" *: *"\([^"]*\)".*/\1/p'; }

# Google's images have NVIDIA's driver, but neither Docker nor the toolkit that gives containers its devices.
install_docker() {
    local apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
    local key=$root/usr/share/keyrings/nvidia-container-toolkit.asc
    local source=https://nvidia.github.io/libnvidia-container
    export DEBIAN_FRONTEND=noninteractive
    if ! command -v docker >/dev/null; then
        say "installing Docker"
        "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends docker.io || return 1
    fi
    if [ "$1" = 0 ] || command -v nvidia-ctk >/dev/null; then return 0; fi
    say "installing NVIDIA's container toolkit"
    mkdir -p "${key%/*}" "$root/etc/apt/sources.list.d"
    curl -fsSL --retry 5 --max-time 60 -o "$key" "$source/gpgkey" || return 1
    # apt itself replaces $(ARCH).
    # shellcheck disable=SC2016
    printf 'deb [signed-by=%s] %s/stable/deb/$(ARCH) /\n' "$key" "$source" >"$root/etc/apt/sources.list.d/nvidia.list"
    "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends nvidia-container-toolkit &&
        nvidia-ctk runtime configure --runtime=docker >/dev/null && systemctl restart docker
}
run() {
    local image host gpus=() try name value version
    image=$(ask instance/attributes/trainer-image) ||
        die 69 "the metadata service does not answer, or names no trainer-image" \
            "give the instance the attribute trainer-image"
    install -d -m 0700 "$root/run/trainer"
    if cat "$root"/sys/bus/pci/devices/*/vendor 2>/dev/null | grep -q 0x10de; then
        for ((try = 0; try < 12; try++)); do
            if nvidia-smi -L >/dev/null 2>&1; then gpus=(--gpus all) && break; fi
            sleep 10
        done
        [ ${#gpus[@]} -gt 0 ] ||
            die 69 "the GPU driver does not answer: nvidia-smi -L fails" "use an image with the driver in it"
        version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
        [ "${version%%.*}" -ge 580 ] 2>/dev/null ||
            die 78 "NVIDIA's driver is $version: CUDA 13 needs 580 or newer" "set VM_IMAGE_FAMILY to a newer image"
        # CUDA needs /dev/nvidia-uvm, which is missing on a fresh boot.
        nvidia-modprobe -c0 -u >/dev/null 2>&1 || true
    fi
    install_docker ${#gpus[@]} ||
        die 69 "Docker and NVIDIA's container toolkit can't be installed" \
            "does the machine reach its package servers? else use an image that has both"
    host=${image%%/*}
    case $host in
    *.pkg.dev)
        token | docker login --username oauth2accesstoken --password-stdin "https://$host" >/dev/null ||
            die 69 "registry $host takes no log-in" \
                "give the instance a service account with the scope cloud-platform and roles/artifactregistry.reader"
        ;;
    esac
    docker pull --quiet "$image" >/dev/null || docker image inspect "$image" >/dev/null 2>&1 ||
        die 69 "image $image can't be pulled" \
            "look at its name, and whether the service account has roles/artifactregistry.reader"
    docker rm --force trainer >/dev/null 2>&1 || true
    {
        # The last setting is the time from the notice to the shutdown; the metadata service does not report it.
        for name in store run-id config preemption-window; do
            value=$(ask "instance/attributes/trainer-$name") ||
                die 69 "the metadata service does not answer, or names no trainer-$name" \
                    "give the instance the attribute trainer-$name"
            name=${name^^}
            echo "TRAINER_${name//-/_}=$value"
        done
        # A spot machine has 30 s from the beginning of the shutdown to its end.
        echo TRAINER_STOP_WINDOW=20s
        # After exit code 0 this script takes the machine away, so the program in its container need not try.
        echo TRAINER_POWER_OFF=host
    } >"$root/run/trainer/env"
    exec docker run --rm --init --name trainer --network host --ipc host --ulimit memlock=-1 --stop-timeout 25 \
        --env-file "$root/run/trainer/env" "${gpus[@]}" "$image" boot --json
}
# Whether another start is pointless, after the last exit as systemd reports it. An unavailable service (69) gets 40
# tries in a row, two hours or more; a bug or a kill gets five; interruptions do not count.
over() {
    local count=0 most=5 counts=$root/run/trainer file
    install -d -m 0700 "$counts"
    file=$counts/failures
    case ${EXIT_CODE:-}:${EXIT_STATUS:-} in
    exited:0 | exited:64 | exited:65 | exited:77 | exited:78 | exited:80 | exited:81) return 0 ;;
    exited:75 | exited:76 | exited:79)
        rm -f "$file" "$counts/away"
        return 1
        ;;
    exited:69)
        rm -f "$file"
        most=40 file=$counts/away
        ;;
    esac
    if [ -r "$file" ]; then count=$(cat "$file"); fi
    echo "$((++count))" >"$file"
    [ "$count" -ge "$most" ]
}
# The machine, and its log with it, is gone a minute later.
keep_log() {
    local bucket run name
    bucket=$(ask instance/attributes/trainer-bucket) && run=$(ask instance/attributes/trainer-run-id) &&
        name=$(ask instance/name) && journalctl -u trainer -n 200 -q >"$root/run/trainer/log" || return 1
    printf 'header = "Authorization: Bearer %s"\n' "$(token)" |
        curl -fsS --max-time 20 -K - -H 'Content-Type: text/plain' --data-binary "@$root/run/trainer/log" \
            "${TRAINER_STORAGE_API:-https://storage.googleapis.com}/upload/storage/v1/b/$bucket/o?uploadType=media&name=machine-logs/$run/$name.log" >/dev/null
}
# A machine without work takes itself out of its group, because the group would replace one that merely powers off.
after() {
    local group self
    if ! over; then return 0; fi
    case ${EXIT_CODE:-}:${EXIT_STATUS:-} in
    exited:0) ;;
    exited:80) say "the run is at its cap" ;;
    *)
        say "giving up: ended with ${EXIT_CODE:-} ${EXIT_STATUS:-}, and a restart would not help"
        timeout 25 "$0" keep_log || say "warning: the last lines are not in the bucket"
        ;;
    esac
    group=$(ask instance/attributes/created-by) || return 0
    self=$(ask instance/zone)/instances/$(ask instance/name)
    # The token goes in through standard input: every user can read arguments.
    printf 'header = "Authorization: Bearer %s"\n' "$(token)" |
        curl -fsS --max-time 15 --retry 5 --retry-all-errors --retry-max-time 60 -K - \
            -H 'Content-Type: application/json' \
            -d "{\"instances\": [\"$self\"]}" "${TRAINER_COMPUTE_API:-https://compute.googleapis.com}/compute/v1/$group/deleteInstances" >/dev/null ||
        say "warning: this machine can't leave its group and costs money: resize the group to 0 by hand"
}
boot() {
    mkdir -p "${me%/*}" "$root/etc/systemd/system"
    install -m 0755 "$0" "$me"
    cat >"$root/etc/systemd/system/trainer.service" <<UNIT
[Unit]
Description=trainer
Wants=network-online.target
After=network-online.target docker.service
StartLimitIntervalSec=0
[Service]
ExecStart=$me run
# -: a container that has ended by itself is gone, which is not a failure that needs another start.
ExecStop=-/usr/bin/docker stop --time 25 trainer
ExecStopPost=$me after
Restart=on-failure
RestartSec=150
RestartForceExitStatus=69 75 76 79
RestartPreventExitStatus=64 65 77 78 80 81
SuccessExitStatus=75 80
KillMode=mixed
# For the log and for leaving the group; docker stop ends the container.
TimeoutStopSec=120
# Cloud Logging keeps the console of a machine that is gone.
StandardOutput=journal+console
StandardError=journal+console
[Install]
WantedBy=multi-user.target
UNIT
    systemctl daemon-reload
    systemctl enable trainer.service
    systemctl start --no-block trainer.service
}
case ${1:-boot} in
boot | run | after | keep_log) "${1:-boot}" ;;
*) die 64 "unknown command $1" "boot, run or after" ;;
esac
