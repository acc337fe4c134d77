#!/usr/bin/env bash
# Google Cloud: an instance template for spot machines, and a managed group that replaces those that are taken, in
# whichever zone of the region has some.
#
#   PROJECT=my-project REGION=us-central1 BUCKET=my-bucket RUN_ID=reports-2026q4 \
#     CONFIG=gs://my-bucket/configs/reports.toml \
#     IMAGE=us-central1-docker.pkg.dev/my-project/trainer/trainer@sha256:… userdata/gcp/instance-template.sh
#
# Costs: the spot price an hour of the machine type and its GPU (gcloud and the pricing page know it by region; it
# changes up to once a day) x hours, its disk (100 GB), an external address. Nothing once the group has size 0: the
# machine takes itself out of the group when the run is complete.
# Removal: the script prints the commands. The network, the service account and the role cost nothing:
# gcloud compute networks delete trainer; gcloud iam service-accounts delete trainer@my-project.iam.gserviceaccount.com;
# gcloud iam roles delete trainerLeavesGroup --project my-project
#
# It makes a service account that may read and write the bucket, pull images and take itself out of its group, unless
# SERVICE_ACCOUNT names one; and a network without any rule, so that nothing gets in, unless NETWORK names one. Zones
# that lack the machine type must be left out: ZONES=us-central1-a,us-central1-b. No Secure Boot: with it the kernel
# loads NVIDIA's modules only if they are signed with a key of the image, and it is not known whether these images'
# modules are. SPOT_NOTICE=120s asks for two minutes between notice and shutdown; without it a machine has 30 s.
#
# What a machine says outlives it: its serial console in Cloud Logging, and the last 200 lines of one that gave up in
# gs://BUCKET/machine-logs/RUN_ID/.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${PROJECT:?}" "${REGION:?}" "${BUCKET:?}" "${RUN_ID:?}" "${CONFIG:?}" "${IMAGE:?}"
# Google's names have small letters, digits and hyphens; what that makes equal, the sum keeps apart.
sum=$(printf %s "$RUN_ID" | sha256sum)
name=$(printf %s "$RUN_ID" | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9' '-')
name=trainer-${name:0:32}-${sum:0:6}
account=${SERVICE_ACCOUNT:-trainer@$PROJECT.iam.gserviceaccount.com}
network=${NETWORK:-trainer}
notice=()
if [ -n "${SPOT_NOTICE:-}" ]; then notice=("--preemption-notice-duration=$SPOT_NOTICE"); fi
zones=()
if [ -n "${ZONES:-}" ]; then zones=("--zones=$ZONES"); fi
# A new account is not known everywhere at once.
again() {
    local try
    for try in 1 2 3 4 5; do
        if "$@" >/dev/null; then return 0; fi
        echo "try $try failed; again in 10 s" >&2
        sleep 10
    done
    "$@" >/dev/null
}
has() { "$@" --project="$PROJECT" >/dev/null 2>&1; }

# A new project may have no GPU at all, whatever its quota in the region says.
gpus=$(gcloud compute project-info describe --project="$PROJECT" --flatten='quotas[]' \
    --format='csv[no-heading](quotas.metric,quotas.limit)' | sed -n 's/^GPUS_ALL_REGIONS,\([0-9]*\).*/\1/p' || true)
if [ "${gpus:-1}" = 0 ]; then
    echo "error: the quota GPUS_ALL_REGIONS of $PROJECT is 0: no machine with a GPU would start" >&2
    echo "hint: ask for 1 at https://console.cloud.google.com/iam-admin/quotas?project=$PROJECT" >&2
    exit 69
fi
if [ -z "${NETWORK:-}" ] && ! has gcloud compute networks describe "$network"; then
    gcloud compute networks create "$network" --project="$PROJECT" --subnet-mode=auto
fi
if [ -z "${SERVICE_ACCOUNT:-}" ] && ! has gcloud iam service-accounts describe "$account"; then
    gcloud iam service-accounts create trainer --project="$PROJECT" --display-name=trainer
    has gcloud iam roles describe trainerLeavesGroup || gcloud iam roles create trainerLeavesGroup \
        --project="$PROJECT" --title='trainer leaves its group' --quiet \
        --permissions=compute.instanceGroupManagers.update,compute.instanceGroupManagers.get,compute.instances.delete
    for role in roles/artifactregistry.reader "projects/$PROJECT/roles/trainerLeavesGroup"; do
        again gcloud projects add-iam-policy-binding "$PROJECT" --member="serviceAccount:$account" --role="$role" \
            --condition=None --quiet
    done
fi
if [ -z "${SERVICE_ACCOUNT:-}" ]; then
    again gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --member="serviceAccount:$account" \
        --role=roles/storage.objectUser --quiet
fi
if ! has gcloud compute instance-templates describe "$name"; then
    gcloud compute instance-templates create "$name" --project="$PROJECT" \
        --machine-type="${MACHINE_TYPE:-g2-standard-4}" --network="$network" \
        --provisioning-model=SPOT --instance-termination-action=DELETE "${notice[@]}" \
        --maintenance-policy=TERMINATE --no-restart-on-failure \
        --image-project="${VM_IMAGE_PROJECT:-deeplearning-platform-release}" \
        --image-family="${VM_IMAGE_FAMILY:-common-cu129-ubuntu-2204-nvidia-580}" \
        --boot-disk-size=100GB --boot-disk-type=pd-balanced \
        --service-account="$account" --scopes=cloud-platform \
        --no-shielded-secure-boot --shielded-vtpm --shielded-integrity-monitoring \
        --metadata="enable-oslogin=TRUE,block-project-ssh-keys=TRUE,serial-port-logging-enable=TRUE,trainer-image=$IMAGE,trainer-bucket=$BUCKET,trainer-store=gs://$BUCKET/runs,trainer-run-id=$RUN_ID,trainer-config=$CONFIG,trainer-preemption-window=${SPOT_NOTICE:-30s}" \
        --metadata-from-file="startup-script=$here/startup.sh,shutdown-script=$here/shutdown.sh"
fi
if ! has gcloud compute instance-groups managed describe "$name" --region="$REGION"; then
    # any: where there are spot machines, not the same number in each zone.
    gcloud compute instance-groups managed create "$name" --project="$PROJECT" --region="$REGION" "${zones[@]}" \
        --template="$name" --size=1 --target-distribution-shape=any --instance-redistribution-type=none
fi
cat <<TEXT
watch:  gcloud logging read 'resource.type=gce_instance AND logName:serialconsole' --project $PROJECT --freshness=1h
stop:   gcloud compute instance-groups managed resize $name --region $REGION --project $PROJECT --size 0
remove: gcloud compute instance-groups managed delete $name --region $REGION --project $PROJECT --quiet
        gcloud compute instance-templates delete $name --project $PROJECT --quiet
TEXT
