#!/usr/bin/env bash
# Google Cloud: an instance template for spot machines, and a managed group that replaces those that are taken.
#
#   PROJECT=my-project ZONE=us-central1-a BUCKET=my-bucket RUN_ID=reports-2026q4 \
#     CONFIG=gs://my-bucket/configs/reports.toml \
#     IMAGE=us-central1-docker.pkg.dev/my-project/trainer/trainer@sha256:… userdata/gcp/instance-template.sh
#
# Costs: the spot price an hour of the machine type and its GPU (gcloud and the pricing page know it by region; it
# changes up to once a day) x hours, its disk (100 GB), an external address. Nothing once the group has size 0: the
# machine takes itself out of the group when the run is complete.
# Removal: gcloud compute instance-groups managed delete "trainer-$RUN_ID" --zone "$ZONE";
# gcloud compute instance-templates delete "trainer-$RUN_ID"
#
# The service account may read and write the bucket (roles/storage.objectUser on it), pull the image
# (roles/artifactregistry.reader), and take itself out of its group (a custom role with
# compute.instanceGroupManagers.update and compute.instances.delete). No Secure Boot: with it the kernel loads NVIDIA's
# modules only if they are signed with a key of the image, and it is not known whether these images' modules are.
# SPOT_NOTICE=120s asks for two minutes between notice and shutdown; without it a machine has 30 s.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?}" "${RUN_ID:?}" "${CONFIG:?}" "${IMAGE:?}"
name=trainer-$RUN_ID
account=${SERVICE_ACCOUNT:-trainer@$PROJECT.iam.gserviceaccount.com}
notice=()
if [ -n "${SPOT_NOTICE:-}" ]; then notice=("--preemption-notice-duration=$SPOT_NOTICE"); fi

if ! gcloud compute instance-templates describe "$name" --project="$PROJECT" >/dev/null 2>&1; then
    gcloud compute instance-templates create "$name" --project="$PROJECT" \
        --machine-type="${MACHINE_TYPE:-g2-standard-4}" \
        --provisioning-model=SPOT --instance-termination-action=DELETE "${notice[@]}" \
        --maintenance-policy=TERMINATE --no-restart-on-failure \
        --image-project="${VM_IMAGE_PROJECT:-deeplearning-platform-release}" \
        --image-family="${VM_IMAGE_FAMILY:-common-cu128-ubuntu-2204-nvidia-570}" \
        --boot-disk-size=100GB --boot-disk-type=pd-balanced \
        --service-account="$account" --scopes=cloud-platform \
        --no-shielded-secure-boot --shielded-vtpm --shielded-integrity-monitoring \
        --metadata="enable-oslogin=TRUE,block-project-ssh-keys=TRUE,trainer-image=$IMAGE,trainer-store=gs://$BUCKET/runs,trainer-run-id=$RUN_ID,trainer-config=$CONFIG,trainer-preemption-window=${SPOT_NOTICE:-30s}" \
        --metadata-from-file="startup-script=$here/startup.sh,shutdown-script=$here/shutdown.sh"
fi
if ! gcloud compute instance-groups managed describe "$name" --project="$PROJECT" --zone="$ZONE" >/dev/null 2>&1; then
    gcloud compute instance-groups managed create "$name" --project="$PROJECT" --zone="$ZONE" --template="$name" \
        --size=1
fi
