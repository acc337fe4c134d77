#!/usr/bin/env bash
# EC2 User Data: makes a fresh machine train, and keeps it training over every restart. No package is installed.
#
# The AMI has Docker and, for GPUs, NVIDIA's driver (580 or newer) and container toolkit. A bundle instead of an image
# needs glibc 2.36 and curl 7.88. userdata/README.md lists the settings in /etc/trainer/machine.conf; none is secret.
#
# stack.yaml carries it compressed. For one machine of your own, put the settings in front and compress both, because
# EC2 takes 16 KB; cloud-init unpacks it:
#
#   { printf '#!/usr/bin/env bash\nexport TRAINER_IMAGE=… TRAINER_STORE=s3://… TRAINER_RUN_ID=… TRAINER_CONFIG=s3://…\n'
#     cat userdata/aws/user-data.sh; } | gzip -9 >/tmp/user-data.gz
#   aws ec2 run-instances --launch-template LaunchTemplateId=lt-… --user-data fileb:///tmp/user-data.gz
#
# The template names type, network, role and spot; that of stack.yaml (its output SpotTemplateId) has User Data already.
#
# Costs: the machine's price an hour x hours, its disk, what it logs.
# Removal: terminate the machine.
#
# It installs itself (below TRAINER_ROOT, if set) as trainer-machine, and a unit that calls it. It is safe to run again,
# and twice at once. Failures go to /var/log/trainer-boot.log, too.
set -Eeuo pipefail
umask 022
root=${TRAINER_ROOT:-}
set -a
# shellcheck disable=SC1091
if [ -r "$root/etc/trainer/machine.conf" ]; then . "$root/etc/trainer/machine.conf"; fi
TRAINER_STOP_WINDOW=${TRAINER_STOP_WINDOW:-100s}
set +a
imds=${AWS_EC2_METADATA_SERVICE_ENDPOINT:-http://169.254.169.254}
image=${TRAINER_IMAGE:-}
run=$root/run/trainer
opt=$root/opt/trainer
me=$root/usr/local/sbin/trainer-machine
vars=$root/etc/trainer/env
region=${AWS_REGION:-}
token='' id=''

say() { printf '%s trainer-machine: %s\n' "$(date -u +%FT%TZ)" "$*" | tee -a "$root/var/log/trainer-boot.log" >&2; }
# die CODE WHAT HINT: the codes are trainer's own.
die() {
	trap - ERR
	say "error: $2"
	say "hint: $3"
	exit "$1"
}
trap 'die 70 "line $LINENO: \"$BASH_COMMAND\" failed" "see the lines above"' ERR
# retry TIMES COMMAND…: with growing pauses of at most 30 s.
retry() {
	local times=$1 try pause=1
	shift
	for ((try = 1; ; try++)); do
		if "$@"; then return 0; fi
		if [ "$try" -ge "$times" ]; then return 1; fi
		sleep "$pause.$((RANDOM % 10))"
		pause=$((pause < 15 ? pause * 2 : 30))
	done
}
# put FILE MODE: writes standard input there if it differs; 0 if it was written.
put() {
	local new
	mkdir -p "${1%/*}"
	new=$(mktemp "$1.XXXXXX")
	cat >"$new"
	chmod "$2" "$new"
	if cmp -s "$new" "$1"; then
		rm -f "$new"
		return 1
	fi
	mv -f "$new" "$1"
}

# --- AWS: the metadata service and signed requests. No argument and no log holds a secret.

get_token() {
	token=$(curl -fsS --noproxy '*' --connect-timeout 2 --max-time 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 600' "$imds/latest/api/token")
}
metadata() {
	printf 'header = "X-aws-ec2-metadata-token: %s"\n' "$token" |
		curl -fsS --noproxy '*' --connect-timeout 2 --max-time 5 -K - "$imds/latest/meta-data/$1"
}
know_machine() {
	if [ -n "$id" ]; then return 0; fi
	retry 8 get_token || die 69 "the metadata service at $imds gives no token" \
		"switch it on (HttpEndpoint: enabled); in a container it needs host network or a hop limit of 2"
	id=$(retry 4 metadata instance-id) || die 69 "the metadata service does not name the instance" "look at $imds by hand"
	region=${region:-$(retry 4 metadata placement/region)} || die 69 "the metadata service does not name the region" "set AWS_REGION"
}
field() { sed -n "s/.*\"$1\" *: *\"\([^\"]*\)\".*/\1/p" | head -n 1; }
# signed REGION SERVICE CURL-ARGUMENT…, with $payload as the body
signed() {
	local sign=aws:amz:$1:$2 role said
	shift 2
	if ! get_token || ! role=$(metadata iam/security-credentials/) || ! said=$(metadata "iam/security-credentials/$role"); then
		say "no credentials: does the launch template name an instance profile?"
		return 1
	fi
	{
		printf 'user = "%s:%s"\n' "$(field AccessKeyId <<<"$said")" "$(field SecretAccessKey <<<"$said")"
		printf 'header = "x-amz-security-token: %s"\n' "$(field Token <<<"$said")"
		if [ -n "${payload:-}" ]; then printf 'data = "%s"\n' "${payload//\"/\\\"}"; fi
	} | curl -fsS --connect-timeout 5 --aws-sigv4 "$sign" -K - "$@"
}
# json REGION SERVICE HOST TARGET: $payload is JSON
json() {
	local version=1.1
	if [ "$2" = states ]; then version=1.0; fi
	signed "$1" "$2" --max-time 20 -H "Content-Type: application/x-amz-json-$version" -H "X-Amz-Target: $4" "${AWS_ENDPOINT_URL:-https://$3.$1.amazonaws.com}/"
}
# tell ACTION MORE: to the task of the state machine, if there is one. A lost success costs another machine.
tell() {
	local said
	if [ -z "${TRAINER_TASK_TOKEN:-}" ]; then return 0; fi
	if ! said=$(payload="{\"Name\":\"$TRAINER_TASK_TOKEN\"}" retry 4 json "$region" ssm ssm AmazonSSM.GetParameter) ||
		! payload="{\"taskToken\":\"$(field Value <<<"$said")\"${2:-}}" retry 4 json "$region" states states "AWSStepFunctions.$1" >/dev/null; then
		say "warning: the state machine did not get $1"
	fi
}

# --- the machine

# Local disks are scratch space: nothing depends on them.
mount_scratch() {
	local disk
	scratch=$root/mnt/trainer
	disk=$(lsblk -dnpo NAME,MODEL 2>/dev/null | awk '/Amazon EC2 NVMe Instance Storage/ {print $1; exit}' || true)
	# The Deep Learning AMI makes one disk of all local ones, in the background. A file system made meanwhile on one of
	# them would be lost, and files written to the folder before it is mounted would lie on the root disk.
	if systemctl cat dlami-nvme.service >/dev/null 2>&1; then
		if [ -n "$disk" ] && retry 9 mountpoint -q "$root/opt/dlami/nvme"; then
			scratch=$root/opt/dlami/nvme
		else
			if [ -n "$disk" ]; then say "warning: dlami-nvme.service mounts no disk; scratch space is on the root disk"; fi
			mkdir -p "$scratch"
		fi
		return 0
	fi
	if mountpoint -q "$scratch"; then return 0; fi
	mkdir -p "$scratch"
	local empty=$disk
	disk=$(blkid -L trainer-scratch || true)
	if [ -z "$disk" ]; then
		disk=$empty
		# Never over existing files.
		if [ -z "$disk" ] || [ -n "$(lsblk -no FSTYPE "$disk" | tr -d ' \n')" ]; then return 0; fi
		mkfs.ext4 -q -L trainer-scratch "$disk" || return 0
	fi
	mount -o noatime "$disk" "$scratch" || say "warning: $disk can't be mounted; scratch space is on the root disk"
}
has_gpu() {
	case ${TRAINER_GPU:-auto} in
	none) return 1 ;;
	required) return 0 ;;
	auto) cat "$root"/sys/bus/pci/devices/*/vendor 2>/dev/null | grep -q 0x10de ;;
	*) die 78 "TRAINER_GPU is \"$TRAINER_GPU\"" "use auto, required or none" ;;
	esac
}
wait_for_gpu() {
	local version
	retry 12 nvidia-smi -L >/dev/null || die 69 "the GPU driver does not answer: nvidia-smi -L fails" \
		"use an AMI with the driver in it; one that was installed since the machine booted needs a reboot"
	version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
	[ "${version%%.*}" -ge 580 ] 2>/dev/null || die 78 "NVIDIA's driver is $version: CUDA 13 needs 580 or newer" "use a newer AMI"
	# CUDA needs /dev/nvidia-uvm, which is missing on a fresh boot.
	nvidia-modprobe -c0 -u >/dev/null 2>&1 || true
	nvidia-smi -pm 1 >/dev/null || true
}
log_in() {
	local host=${image%%/*} at said
	[[ $host =~ ^[0-9]{12}\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com$ ]] || return 0
	at=${BASH_REMATCH[1]}
	said=$(payload='{}' json "$at" ecr api.ecr AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken) || return 1
	field authorizationToken <<<"$said" | base64 -d | cut -d: -f2- | docker login --username AWS --password-stdin "$host" >/dev/null
}
pull() { log_in && docker pull --quiet "$image" >/dev/null; }
get_image() {
	command -v docker >/dev/null || die 78 "TRAINER_IMAGE is set, but Docker is not installed" "use an AMI with Docker in it, or TRAINER_BUNDLE"
	retry 10 docker info >/dev/null 2>&1 || die 69 "the Docker daemon does not answer" "journalctl -u docker"
	# An image named by digest never changes.
	case $image in *@sha256:*) if docker image inspect "$image" >/dev/null 2>&1; then return 0; fi ;; esac
	if retry 6 pull; then return 0; fi
	docker image inspect "$image" >/dev/null 2>&1 || die 69 "image $image can't be pulled" \
		"look at its name, and whether the role may ecr:GetAuthorizationToken, BatchGetImage and GetDownloadUrlForLayer"
	say "warning: $image can't be pulled; using the local one"
}
download() {
	local path=${TRAINER_BUNDLE#s3://}
	case $TRAINER_BUNDLE in
	s3://*) signed "$region" s3 --max-time 1800 -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' -o "$1" "${AWS_ENDPOINT_URL:-https://s3.$region.amazonaws.com}/$path" ;;
	https://* | http://127.0.0.1:*) curl -fsSL --connect-timeout 5 --max-time 1800 -o "$1" "$TRAINER_BUNDLE" ;;
	*) die 78 "TRAINER_BUNDLE is neither s3:// nor https://" "correct /etc/trainer/machine.conf" ;;
	esac
}
get_bundle() {
	local sum=${TRAINER_BUNDLE_SHA256:-} got partial
	[[ $sum =~ ^[0-9a-f]{64}$ ]] || die 78 "TRAINER_BUNDLE_SHA256 is not a SHA-256" "sha256sum the bundle and write it to /etc/trainer/machine.conf"
	if [ ! -x "$opt-$sum/trainer" ]; then
		rm -rf "$opt"-*.partial
		partial=$(mktemp -d "$opt-XXXXXX.partial")
		retry 6 download "$partial/bundle.tar.gz" || die 69 "the bundle can't be downloaded" \
			"look at TRAINER_BUNDLE, whether the role may s3:GetObject there, and that curl is 7.88 or newer"
		got=$(sha256sum "$partial/bundle.tar.gz")
		[ "${got%% *}" = "$sum" ] || die 65 "the bundle's SHA-256 is ${got%% *}, not $sum" "another file was uploaded since: correct TRAINER_BUNDLE_SHA256, or the file"
		tar -xzf "$partial/bundle.tar.gz" -C "$partial" --no-same-owner
		rm -f "$partial/bundle.tar.gz"
		[ -x "$partial/trainer" ] || die 65 "the bundle holds no executable \`trainer\`" "make it as userdata/README.md says"
		chmod 755 "$partial"
		mv -T "$partial" "$opt-$sum"
	fi
	ln -sfnT "$opt-$sum" "$opt"
}

# --- what the unit calls

run() {
	local command=(boot --json ${TRAINER_NODES:+--nodes "$TRAINER_NODES"}) stop line gpus=() logs=() more=()
	install -d -m 0700 "$run"
	export DOCKER_CONFIG=$run/docker
	know_machine
	export AWS_REGION=$region
	[[ $TRAINER_STOP_WINDOW =~ ^[1-9][0-9]*s$ ]] || die 78 "TRAINER_STOP_WINDOW is \"$TRAINER_STOP_WINDOW\"" "write seconds: 100s"
	# Not for a program that hangs. Ends with the unit.
	if [ -n "${TRAINER_TASK_TOKEN:-}" ]; then
		(while sleep 300; do if [ -n "$(journalctl -u trainer --since=-6min -n 1 -q -o cat)" ]; then tell SendTaskHeartbeat; fi; done) &
	fi
	mount_scratch
	chmod 1777 "$scratch"
	if has_gpu; then
		wait_for_gpu
		gpus=(--gpus all)
	fi
	if [ -n "${TRAINER_QUEUE:-}" ]; then command=(work --json --terminate-when-idle); fi
	if [ -z "$image" ]; then
		if [ -n "${TRAINER_BUNDLE:-}" ]; then get_bundle; fi
		[ -x "$opt/trainer" ] || die 78 "there is no $opt/trainer" "set TRAINER_IMAGE or TRAINER_BUNDLE in /etc/trainer/machine.conf, or use an AMI that has it"
		# The user's own variables.
		if [ -r "$vars" ]; then while IFS= read -r line; do case $line in [A-Za-z_]*=*) export "${line?}" ;; esac; done <"$vars"; fi
		say "starting $opt/trainer ${command[*]} on $id"
		LD_LIBRARY_PATH=$opt/lib TMPDIR=$scratch exec "$opt/trainer" "${command[@]}"
	fi
	get_image
	# A container of an earlier life.
	docker stop --time 110 trainer >/dev/null 2>&1 || true
	docker rm trainer >/dev/null 2>&1 || true
	env | grep -E '^(TRAINER_(CONFIG|STORE|RUN_ID|RUN_ID_TEMPLATE|TIME_ZONE|SSM_PATH|SSM_ENVIRONMENT|QUEUE|ALLOW|STOP_WINDOW|LOG)|AWS_REGION)=' >"$run/env"
	if [ -n "${TRAINER_LOG_GROUP:-}" ]; then
		# Training never waits for a log.
		logs=(--log-driver awslogs --log-opt "awslogs-region=$region" --log-opt "awslogs-group=$TRAINER_LOG_GROUP"
			--log-opt "awslogs-stream=$id" --log-opt mode=non-blocking --log-opt max-buffer-size=4m)
	fi
	# The user's own variables: proxies, HF_TOKEN, NCCL_*. Those above win. A configuration on this machine.
	if [ -r "$vars" ]; then more+=(--env-file "$vars"); fi
	case ${TRAINER_CONFIG:-} in /*) more+=(--volume "$TRAINER_CONFIG:$TRAINER_CONFIG:ro") ;; esac
	if leaves; then logs+=(--env TRAINER_POWER_OFF=host); fi
	if [ -e "$root/dev/infiniband" ]; then gpus+=(--device /dev/infiniband); fi
	stop=$((${TRAINER_STOP_WINDOW%s} + 10))
	say "starting $image ${command[*]} on $id"
	# Host network for the metadata service and NCCL; host IPC and memory locks for NCCL and pinned snapshots.
	exec docker run --rm --init --name trainer --network host --ipc host --ulimit memlock=-1 --stop-timeout "$stop" \
		"${more[@]}" --env-file "$run/env" --env TMPDIR=/scratch --env XDG_CACHE_HOME=/scratch \
		--volume "$scratch:/scratch" "${gpus[@]}" "${logs[@]}" "$image" "${command[@]}"
}
stop() { if [ -n "$image" ]; then docker stop --time "$((${TRAINER_STOP_WINDOW%s} + 10))" trainer >/dev/null || true; fi; }
# scaling ACTION PARAMETERS: of Auto Scaling.
scaling() {
	payload="Action=$1&Version=2011-01-01&$2" retry 6 \
		signed "$region" autoscaling --max-time 10 "${AWS_ENDPOINT_URL:-https://autoscaling.$region.amazonaws.com}/"
}
# A waiting job would raise the capacity.
hold() { scaling SuspendProcesses "AutoScalingGroupName=$TRAINER_GROUP&ScalingProcesses.member.1=AlarmNotification" >/dev/null; }
# The group ends this machine without a replacement; it may already be doing so.
leave() { leaving || [ -n "$(scaling TerminateInstanceInAutoScalingGroup "ShouldDecrementDesiredCapacity=true&InstanceId=$id")" ] || leaving; }
leaving() { [ "$(metadata autoscaling/target-lifecycle-state 2>/dev/null)" = Terminated ]; }
# The metadata service has answered, and names no group.
in_no_group() { [[ $(metadata autoscaling/target-lifecycle-state 2>&1) == *"error: 404"* ]]; }
# Sends $NOTE and the last output to the topic.
publish() {
	if [ -z "${TRAINER_TOPIC:-}" ]; then return 0; fi
	payload="Action=Publish&Version=2010-03-31&TopicArn=$TRAINER_TOPIC&Subject=trainer+needs+attention" retry 3 signed "$region" sns --max-time 10 \
		--data-urlencode "Message=$id, log group ${TRAINER_LOG_GROUP:-none}: ${NOTE:+$NOTE$'\n'}$(journalctl -u trainer -n 20 -q -o cat)" \
		"${AWS_ENDPOINT_URL:-https://sns.$region.amazonaws.com}/" >/dev/null
}
# within SECONDS COMMAND…: systemd gives `after` 130 s in all.
within() { timeout "$1" "$me" "${@:2}"; }
# A run that can't start must not keep buying machines.
give_up() {
	local off=
	say "giving up: $1"
	systemctl stop --no-block trainer.service
	# After a start by hand the count begins anew.
	rm -f "$run/failures" "$run/away"
	if [ "${TRAINER_ON_FAILURE:-keep}" != terminate ]; then
		say "hint: the machine stays and costs money (TRAINER_ON_FAILURE=keep); fix it and run systemctl start trainer"
	else
		if within 45 leave; then
			say "its group ends this machine, its capacity lowered by one"
		else
			off=yes
			say "no Auto Scaling group ends this machine: powering off"
		fi
		if [ -n "${TRAINER_QUEUE:-}" ] && [ -n "${TRAINER_GROUP:-}" ]; then
			if within 20 hold; then
				NOTE="jobs start no machine until you fix it and run: aws autoscaling resume-processes --auto-scaling-group-name $TRAINER_GROUP --scaling-processes AlarmNotification"
			else
				NOTE="waiting jobs may start machines forever: set the MaxSize of $TRAINER_GROUP to 0"
			fi
			export NOTE
			say "warning: $NOTE"
		fi
		within 20 tell SendTaskFailure ',"error":"TrainerGaveUp","cause":"see the log"' || true
	fi
	within 20 publish || say "warning: the topic got no message"
	if [ -n "$off" ]; then shutdown -h now; fi
}
leaves() { [ -n "${TRAINER_QUEUE:-}" ] || [ "${TRAINER_ON_COMPLETE:-}" = terminate ]; }
# A container can leave a group, if the group answers, but can't power anything off.
complete() {
	# The run is at its cap: no machine makes it go on.
	if [ "${EXIT_STATUS:-}" = 80 ]; then
		export NOTE="the run is at its cap: trainer resume --set run.max_hours=N (or max_wait_hours, max_cost) goes on"
		within 15 tell SendTaskFailure ',"error":"TrainerAtCap","cause":"see the log"' || true
		within 15 publish || true
	else
		within 30 tell SendTaskSuccess ',"output":"{}"' || true
	fi
	if ! leaves; then return 0; fi
	if within 20 in_no_group; then
		if [ -n "$image" ]; then shutdown -h now; fi
	elif ! within 45 leave; then
		say "warning: done, but the machine can't leave its group and costs money: check MinSize and the role, and end it"
		within 20 publish || true
	fi
}
# The meaning of the run's end; systemd then restarts it or not. Interruptions do not count. An unavailable service (69)
# comes back or never does: 40 times in a row take two hours and a half. Five other failures in a row are enough.
after() {
	local count=0 most=5 file=$run/failures
	install -d -m 0700 "$run"
	case ${EXIT_CODE:-}:${EXIT_STATUS:-} in
	exited:0 | exited:80)
		complete
		return 0
		;;
	exited:75 | exited:76 | exited:79)
		rm -f "$run/failures" "$run/away"
		return 0
		;;
	exited:64 | exited:65 | exited:77 | exited:78 | exited:81)
		give_up "exit code $EXIT_STATUS: a restart would not help"
		return 0
		;;
	exited:69)
		rm -f "$file"
		most=40 file=$run/away
		;;
	esac
	if [ -r "$file" ]; then count=$(cat "$file"); fi
	echo "$((++count))" >"$file"
	if [ "$count" -ge "$most" ]; then give_up "failed $count times in a row, last with ${EXIT_CODE:-} ${EXIT_STATUS:-}"; fi
}
boot() {
	mkdir -p "$root/var/log" "$root/run" "$root/opt" "$root/etc/trainer"
	exec 9>"$root/run/trainer-boot.lock"
	flock 9
	put "$me" 755 <"$0" || true
	# After a driver upgrade under a running job the driver is gone until the next reboot.
	systemctl disable --now unattended-upgrades.service apt-daily-upgrade.timer >/dev/null 2>&1 || true
	local changed=
	if put "$root/etc/systemd/system/docker.service.d/trainer.conf" 644 <<'UNIT'; then changed=yes; fi
[Service]
TimeoutStopSec=130
UNIT
	if put "$root/etc/systemd/system/trainer.service" 644 <<UNIT; then changed=yes; fi
[Unit]
Description=trainer
Wants=network-online.target
After=network-online.target docker.service dlami-nvme.service
StartLimitIntervalSec=0
[Service]
ExecStart=$me run
ExecStop=$me stop
ExecStopPost=$me after
# 150 s: longer than a notice lasts, so that a machine that is going away does not start again and fence its replacement.
Restart=on-failure
RestartSec=150
RestartForceExitStatus=69 75 76 79
RestartPreventExitStatus=64 65 77 78 80 81
SuccessExitStatus=75 80
KillMode=mixed
TimeoutStopSec=130
StandardOutput=journal+console
StandardError=journal+console
[Install]
WantedBy=multi-user.target
UNIT
	if [ -n "$changed" ]; then systemctl daemon-reload; fi
	exec 9>&-
	systemctl enable trainer.service
	systemctl start --no-block trainer.service
	say "installed; follow it with: journalctl -fu trainer"
}
case ${1:-boot} in
boot | run | stop | after) "${1:-boot}" ;;
leave | in_no_group | hold | tell | publish)
	know_machine
	"$@" || exit 1
	;;
*) die 64 "unknown command $1" "boot, run, stop or after" ;;
esac
