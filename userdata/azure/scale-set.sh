#!/usr/bin/env bash
# Azure: a scale set of one spot machine, which Azure tries to restore when it was evicted.
#
#   GROUP=training LOCATION=westeurope IMAGE=registry.azurecr.io/trainer@sha256:… ACCOUNT=… \
#     STORE=az://container/runs RUN_ID=reports-2026q4 CONFIG=az://container/reports.toml \
#     userdata/azure/scale-set.sh
#
# Costs: the spot price an hour of the size
# (https://azure.microsoft.com/pricing/details/virtual-machine-scale-sets/linux/; or the Retail Prices API) x hours, its
# disk, a public address. Nothing once the machine has deleted itself, which it does when the run is complete.
# Removal: az vmss delete --resource-group "$GROUP" --name "trainer-$RUN_ID";
# az network nsg delete --resource-group "$GROUP" --name "trainer-$RUN_ID"
#
# The machine's identity may write to the storage account (Storage Blob Data Contributor on the container) and delete
# itself (Virtual Machine Contributor on the scale set): run two `az role assignment create` with the identity that this
# prints. The image's registry must need no login (or the image must be in the VM image). Scheduled events give 30 s at
# an eviction. A deletion comes without one: Azure announces it for no spot machine.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${GROUP:?}" "${LOCATION:?}" "${IMAGE:?}" "${ACCOUNT:?the storage account}" "${STORE:?}" "${RUN_ID:?}" "${CONFIG:?}"
name=trainer-$RUN_ID
custom=$(mktemp)
trap 'rm -f "$custom"' EXIT
# Addresses contain no |.
sed -e "s|@IMAGE@|$IMAGE|" -e "s|@ACCOUNT@|$ACCOUNT|" -e "s|@STORE@|$STORE|" -e "s|@RUN_ID@|$RUN_ID|" \
    -e "s|@CONFIG@|$CONFIG|" "$here/cloud-init.yaml" >"$custom"
if az vmss show --resource-group "$GROUP" --name "$name" --output none 2>/dev/null; then
    echo "$name already exists" >&2
    exit 0
fi
# A new group accepts no connections from outside of its network.
az network nsg create --resource-group "$GROUP" --location "$LOCATION" --name "$name" --output none
az vmss create --resource-group "$GROUP" --location "$LOCATION" --name "$name" \
    --orchestration-mode Uniform --instance-count 1 --vm-sku "${SIZE:-Standard_NC4as_T4_v3}" \
    --image "${VM_IMAGE:-microsoft-dsvm:ubuntu-hpc:2204:latest}" --os-disk-size-gb 128 \
    --priority Spot --eviction-policy Delete --max-price -1 --enable-spot-restore True --spot-restore-timeout PT1H \
    --assign-identity '[system]' --public-ip-per-vm --load-balancer '' --nsg "$name" \
    --admin-username trainer --generate-ssh-keys --custom-data "$custom" --output none
az vmss show --resource-group "$GROUP" --name "$name" --query identity.principalId --output tsv
