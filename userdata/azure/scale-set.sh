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
# Removal: the script prints the commands.
#
# The machine's identity exists before the machine, and has its roles: it may write to the container and delete machines
# of the scale set. A role takes up to half an hour to be known everywhere, so the machine waits for it. The image's
# registry must need no login (or the image must be in the VM image). Scheduled events give 30 s at an eviction. A
# deletion comes without one: Azure announces it for no spot machine.
#
# Azure stops restoring after SPOT_RESTORE (four hours; outages of more than three have been seen). Until the run is
# complete, run this script again each hour from cron, on a machine that is always on: if the set has no machine, it
# starts one and says so, and cron mails that. (The machine of a complete run is gone in minutes.)
# The last 200 lines of a machine that gave up are in the container, below machine-logs/RUN_ID/.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${GROUP:?}" "${LOCATION:?}" "${IMAGE:?}" "${ACCOUNT:?the storage account}" "${STORE:?}" "${RUN_ID:?}" "${CONFIG:?}"
# Azure's names have letters, digits and hyphens; what that makes equal, the sum keeps apart.
sum=$(printf %s "$RUN_ID" | sha256sum)
name=$(printf %s "$RUN_ID" | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9' '-')
name=trainer-${name:0:32}-${sum:0:6}
container=${STORE#az://}
container=${container%%/*}
if az vmss show --resource-group "$GROUP" --name "$name" --output none 2>/dev/null; then
    machines=$(az vmss list-instances --resource-group "$GROUP" --name "$name" --query 'length(@)' --output tsv)
    if [ "$machines" = 0 ]; then
        echo "$name has no machine: starting one"
        az vmss scale --resource-group "$GROUP" --name "$name" --new-capacity 1 --output none
    fi
    exit 0
fi
az identity create --resource-group "$GROUP" --location "$LOCATION" --name "$name" --output none
of_identity() { az identity show --resource-group "$GROUP" --name "$name" --query "$1" --output tsv; }
identity=$(of_identity id)
client=$(of_identity clientId)
principal=$(of_identity principalId)
account=$(az storage account show --name "$ACCOUNT" --query id --output tsv)
az role assignment create --assignee-object-id "$principal" --assignee-principal-type ServicePrincipal --output none \
    --role 'Storage Blob Data Contributor' --scope "$account/blobServices/default/containers/$container"
custom=$(mktemp)
trap 'rm -f "$custom"' EXIT
# Addresses contain no |.
sed -e "s|@IMAGE@|$IMAGE|g" -e "s|@ACCOUNT@|$ACCOUNT|g" -e "s|@STORE@|$STORE|g" -e "s|@RUN_ID@|$RUN_ID|g" \
    -e "s|@CONFIG@|$CONFIG|g" -e "s|@CLIENT@|$client|g" "$here/cloud-init.yaml" >"$custom"
# A new group accepts no connections from outside of its network.
az network nsg create --resource-group "$GROUP" --location "$LOCATION" --name "$name" --output none
# Without a machine at first: its role to delete itself needs the set.
az vmss create --resource-group "$GROUP" --location "$LOCATION" --name "$name" \
    --orchestration-mode Uniform --instance-count 0 --vm-sku "${SIZE:-Standard_NC4as_T4_v3}" \
    --image "${VM_IMAGE:-microsoft-dsvm:ubuntu-hpc:2204:latest}" --os-disk-size-gb 128 \
    --priority Spot --eviction-policy Delete --max-price -1 --enable-spot-restore True \
    --spot-restore-timeout "${SPOT_RESTORE:-PT4H}" \
    --assign-identity "$identity" --public-ip-per-vm --load-balancer '' --nsg "$name" \
    --admin-username trainer --generate-ssh-keys --custom-data "$custom" --output none
set_id=$(az vmss show --resource-group "$GROUP" --name "$name" --query id --output tsv)
az role assignment create --assignee-object-id "$principal" --assignee-principal-type ServicePrincipal --output none \
    --role 'Virtual Machine Contributor' --scope "$set_id"
az vmss scale --resource-group "$GROUP" --name "$name" --new-capacity 1 --output none
cat <<TEXT
watch:  trainer status --run-id $RUN_ID --store $STORE
stop:   az vmss scale --resource-group $GROUP --name $name --new-capacity 0
remove: az vmss delete --resource-group $GROUP --name $name
        az network nsg delete --resource-group $GROUP --name $name
        az identity delete --resource-group $GROUP --name $name
TEXT
