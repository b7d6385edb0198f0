"""A Django project in one file: a view that saves a lead and asks for a draft, both or neither.

    pip install sluicegate django
    sluice db upgrade          # Sluicegate's tables, in a schema of their own
    python crm.py create       # the table of this example
    python crm.py runserver --noreload
    curl -d name=Ada http://127.0.0.1:8000/leads
    curl http://127.0.0.1:8000/leads/1

Both use the database of SLUICE_DATABASE_URL. `connection=` puts the job into the transaction of the
view: if saving the lead fails, there is no job; if the process dies after the commit, the job runs.
"""

from __future__ import annotations

import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.db import IntegrityError, connection, models, transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from sqlalchemy import make_url

from sluicegate import Settings, Sluice

url = make_url(Settings().database_url.get_secret_value())
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": url.host,
            "PORT": url.port,
            "NAME": url.database,
            "USER": url.username,
            "PASSWORD": url.password,
        }
    },
)
application = get_wsgi_application()
sluice = Sluice()  # one for the process: threads share it, and forked workers begin anew


class Lead(models.Model):
    """Somebody who may buy, and the job that writes to them."""

    id = models.BigAutoField(primary_key=True)
    name = models.CharField(max_length=100, unique=True)
    job_id = models.UUIDField()

    class Meta:
        """Where it belongs, as a project in one file has no apps."""

        app_label = "crm"

    def __str__(self) -> str:
        return self.name


def add_lead(request: HttpRequest) -> JsonResponse:
    """Save a lead and submit its draft in one transaction."""
    name = request.POST["name"]
    try:
        with transaction.atomic():
            job = sluice.submit("draft", f"Write a welcome to {name}.", connection=connection)
            lead = Lead.objects.create(name=name, job_id=job.id)
    except IntegrityError:
        return JsonResponse({"error": f"{name} is a lead already"}, status=409)
    return JsonResponse({"lead": lead.id, "job": job.id}, status=201)


def show_lead(_request: HttpRequest, lead_id: int) -> JsonResponse:
    """Show a lead, and its draft once that is done; nobody waits."""
    lead = Lead.objects.get(pk=lead_id)
    job = sluice.get(lead.job_id)
    draft = job.result.text if job.result else None
    return JsonResponse({"name": lead.name, "state": job.state, "draft": draft})


urlpatterns = [path("leads", add_lead), path("leads/<int:lead_id>", show_lead)]

if __name__ == "__main__":
    if sys.argv[1:] == ["create"]:
        with connection.schema_editor() as editor:
            editor.create_model(Lead)
    else:
        execute_from_command_line(sys.argv)
