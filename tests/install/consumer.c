/* A program outside the tree that uses the installed library: a group of one comes and goes. */
#include <stdio.h>

#include <epx/epx.h>

int main(void)
{
    epx_group_config_t config = {.size = sizeof config, .backend = EPX_BACKEND_CPU, .ranks = 1};
    epx_unique_id_t id;
    epx_group_t *group = NULL;
    epx_status_t status = epx_unique_id_create(NULL, &id);
    config.id = &id;
    if (status == EPX_OK)
        status = epx_group_create(&config, &group);
    if (status != EPX_OK) {
        fprintf(stderr, "%s: %s\n", epx_status_name(status), epx_error_detail());
        return 1;
    }
    epx_group_destroy(group);
    printf("epx %u.%u used from outside\n", epx_version() >> 16, epx_version() >> 8 & 255);
    return 0;
}
